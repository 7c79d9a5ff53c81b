"""Clips and bounds on equal terms. This plan was written before anything was compared.

*Question.* Which rule lets a user who tunes little reach a good loss, and at how many
learning rates?

*Tasks.* RNN, LSTM and transformer of characters (Python's documentation), a perceptron
of 12 layers of tanh and a small convolutional net on digits, and a policy gradient
(REINFORCE with a Gaussian) that balances a pole. Batches of 8; runs of 200 and of 1,000
steps. The score of a run is its held-out loss, mean of the last three of 20 evaluations
(of the policy, 1 minus the mean reward, which is between 0 and 1).

*Optimizers.* SGD with momentum 0.9; Adam.

*Contenders.* Those of `_contenders.CONTENDERS`, each with four settings of its own, the
first of which is the published or the usual one, and no clip at all. SPAM's clip and
StableAdamW are of Adam only. No contender is tuned otherwise, dropped or added after
results are seen. Rules by leaf see the layers of a stack as leaves.

*Budget.* Each gets 52 configurations for each task, optimizer and length: 13 learning
rates (SGD 0.003 to 3, Adam 0.0003 to 0.3, by quarter decades) times four settings;
unclipped, which has none, 52 learning rates over the same range. Tuning seeds 0 to 3;
test seeds 1000 to 1011; all contenders see the same initial parameters and batches (the
policy's episodes: the same random numbers).

*Measures.* A run's progress is the share of the way from the trivial loss (frequencies
of classes; a policy of zeros) to the lowest mean test loss of any configuration of that
task, optimizer and length; 0 if that is negative or the loss is not finite.
1. `tuned`: test progress after a random search of 12 of the 52 configurations, chosen
   by the mean progress on the tuning seeds: the expectation over all such searches.
   And of 4, and of all 52.
2. `width`: decades of learning rates at which a test run trains (progress of at least a
   half), with the contender's first setting; also with the setting of its best
   configuration on the tuning seeds; and `near`: those at which the mean test progress
   is at least 0.95, with the first setting. 3.25 decades is the most.
3. `untuned`: mean test progress over all learning rates with the first setting.

*Analysis.* Means over tasks. Intervals of 95 % by a paired bootstrap, 10,000 times: six
tasks are drawn with replacement, and 12 test seeds within each, the same for all
contenders. The winner of a measure is the contender with the highest mean; those whose
difference from it has an interval with 0 in it are not told apart from it. The main
comparisons are eight: ours by leaf and by tree against the fixed clip, in `tuned` after
12 and in `width`, for each optimizer, at 200 steps. All others are to look at. Null
results stay in the table.

*Calibration.* Ranges of learning rates and sizes of models were set by looking at
unclipped runs and the fixed clip at 1 on tuning seed 0 alone.

*Second round.* Written after the first was seen. On tuning seeds 0 and 1, RNN, LSTM,
convolutional net and perceptrons of 12 and 32 layers, two more forms of our bound were
found and their numbers set: joint and by the sum (`_update_bound`). Both are judged on
test seeds 2000 to 2011, which nobody has seen, beside all contenders of the first
round, with the same budget, measures and analysis. There is a seventh task, a
transformer of 12 blocks, since rules that share a bound among all layers may be too
slow for deep networks that train without. The main comparisons are both against ours by
leaf and against the fixed clip, in `tuned` after 12 and in `width`, at 200 and at 1,000
steps.

    python -m benchmarks.neutral --out DIR --part A    # then B: a GPU, 3 minutes each
    python -m benchmarks.neutral --out DIR2 --round 2 --part A    # then B and C
    python -m benchmarks.neutral --table DIR           # Markdown; a figure in DIR
    python -m benchmarks.neutral --out DIR --quick     # a dry run on a CPU
"""

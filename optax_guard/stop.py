"""Stop rules for `early_stopping`, combinators of them, and smoothing."""

from optax_guard._smoothing import Smoother as Smoother
from optax_guard._smoothing import ema as ema
from optax_guard._smoothing import median as median
from optax_guard._stop_base import Observation as Observation
from optax_guard._stop_base import StopRule as StopRule
from optax_guard._stop_base import Verdict as Verdict
from optax_guard._stop_combinators import all_of as all_of
from optax_guard._stop_combinators import any_of as any_of
from optax_guard._stop_combinators import cooldown as cooldown
from optax_guard._stop_combinators import held_for as held_for
from optax_guard._stop_combinators import monitor as monitor
from optax_guard._stop_combinators import not_before as not_before
from optax_guard._stop_guard import skip_storm as skip_storm
from optax_guard._stop_lag import lag as lag
from optax_guard._stop_lag import overfitting as overfitting
from optax_guard._stop_plateau import apply_plateau as apply_plateau
from optax_guard._stop_plateau import plateau as plateau
from optax_guard._stop_plateau import scale_by_plateau as scale_by_plateau
from optax_guard._stop_prechelt import generalization_loss as generalization_loss
from optax_guard._stop_prechelt import progress_quotient as progress_quotient
from optax_guard._stop_prechelt import successive_rises as successive_rises
from optax_guard._stop_rules import budget as budget
from optax_guard._stop_rules import divergence as divergence
from optax_guard._stop_rules import patience as patience
from optax_guard._stop_rules import target as target

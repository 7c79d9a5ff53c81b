"""Training loops that run on the device: one run, or a population of them."""

from optax_guard._device_loop import train_on_device as train_on_device
from optax_guard._population import PopulationResult as PopulationResult
from optax_guard._population import train_population as train_population

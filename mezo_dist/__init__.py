"""mezo_dist: distributed zeroth-order fine-tuning of Hugging Face models, with forward passes only.

Importing the package imports nothing else, so that `mezo-dist --help` answers at once. Take what you need
from its modules: `from mezo_dist.directions.combination import Combination`.
"""

__version__ = "0.1.0"

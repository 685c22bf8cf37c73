"""Joint training of all domains under their budgets; checkpoints."""

from bap.train.evaluate import check_splits
from bap.train.finite import TrainError
from bap.train.schedule import learning_rate
from bap.train.trainer import Trainer, backend_of

__all__ = ["TrainError", "Trainer", "backend_of", "check_splits", "learning_rate"]

"""Data in: files of questions and conversations as they lie on disk, checked row by row.

sources    parquet, JSON lines and TSV, streamed or read at random within a budget of memory
rows       a row's columns by name, and values that are checked when they are taken
layouts    what the columns mean: Metis-RL, Metis-ColdStart, TRL's and our own
benchmarks ... and V*Bench's, HR-Bench's, MathVista's
examples   what a row is: Example, Conversation
pictures   bytes that become pixels on access, within limits
dataset    all rows of some files, and why the others are not used
order      the order of training, without a list of indices
"""

from trainer.data.dataset import Checks, Dataset, Rejected, Rejections
from trainer.data.examples import Conversation, Example, Message, PolicyTurn
from trainer.data.layouts import LAYOUTS
from trainer.data.order import RowSet, permute
from trainer.data.pictures import BadRow, Picture
from trainer.data.sources import DataError, find_files

__all__ = [
    "LAYOUTS",
    "BadRow",
    "Checks",
    "Conversation",
    "DataError",
    "Dataset",
    "Example",
    "Message",
    "Picture",
    "PolicyTurn",
    "Rejected",
    "Rejections",
    "RowSet",
    "find_files",
    "permute",
]

"""The model as it is: nothing is reduced."""

from .base import Counts, Reducer

REDUCER = Reducer("none", "none", "the model as it is", steps=lambda options, size: Counts(options))

"""Causes: each planted in a model of another kind than the zoo's, beside the cause that it is most like."""

"""An operation to tune: a blocked product of square matrices."""

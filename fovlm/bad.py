"""What the readers of stored samples raise when a sample cannot be used."""


class SampleError(ValueError):
    """One sample is broken; the run goes on with a substitute.

    The message is the cause, in words that are the same for every sample broken in this way: causes are counted.
    """

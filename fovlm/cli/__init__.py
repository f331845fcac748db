"""The command `fovlm`: each command parses its options and calls one function of another package."""

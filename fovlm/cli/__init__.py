"""The command `fovlm`: thin; every command says what it wants and calls one function elsewhere."""

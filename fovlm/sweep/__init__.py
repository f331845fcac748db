"""Many runs in one command."""

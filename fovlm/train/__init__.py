"""Training: the trainer and its engine, losses, schedules, validation, logging, resuming."""

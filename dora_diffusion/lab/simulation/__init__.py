"""Plans a fleet past this machine: a queue of subjects, workers that fail, and closed forms."""

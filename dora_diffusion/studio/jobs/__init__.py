"""Jobs in processes that outlive the app: a queue on disk, its workers and their reports."""

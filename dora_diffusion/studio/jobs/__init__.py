"""Work in processes that outlive who started them: a queue on disk, its workers, what they say."""

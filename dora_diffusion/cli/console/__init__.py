"""Messages that the command line and the app share: errors and progress."""

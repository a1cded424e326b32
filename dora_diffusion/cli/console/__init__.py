"""What the command line and the app say alike: errors and progress."""

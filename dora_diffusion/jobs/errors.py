"""What is raised where a person asks for something that cannot be done."""


class RequestError(ValueError):
    """It cannot be done as it was asked for; one plain line with what to do."""

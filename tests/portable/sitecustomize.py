"""Python runs this when it starts with this folder in PYTHONPATH: ``make test-portable``.

The test process, the workers that it starts and every command that a test runs inherit it.
"""

import windows

windows.install()

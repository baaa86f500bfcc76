"""`python -m service.probe`: see service.client.probe."""

import sys

from service.client.probe import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m service.client IMAGE…`: classifies images through a server."""

import sys

from service.client.command import main

if __name__ == "__main__":
    sys.exit(main())

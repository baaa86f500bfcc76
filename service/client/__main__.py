"""`python -m service.client IMAGE…`: classifies images through a server."""

import sys

from service.client.client import main

if __name__ == "__main__":
    sys.exit(main())

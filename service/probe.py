"""`python -m service.probe [HOST:PORT]`: asks a server for its health. See service.client.probe."""

import sys

from service.client.probe import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m service.probe [HOST:PORT]`: asks a server for its health. See service.client.probe."""

import sys

from cifar_core.errors import needs_extra

if __name__ == "__main__":
    with needs_extra("serve"):
        from service.client.probe import main
    sys.exit(main())

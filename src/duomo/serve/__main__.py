"""`python -m duomo.serve --model PATH --port 8180 ...` is `duomo serve` with the same flags."""

import sys

from duomo.errors import Error
from duomo.serve.run import serve

try:
    code = serve(sys.argv[1:])
except KeyboardInterrupt:
    code = 130
except Error as error:
    print(f"duomo: {' '.join(error.message.split())}", file=sys.stderr)
    code = 2
sys.exit(code)

# SPDX-License-Identifier: BSD-3-Clause
"""``python -m vhostsock``: the ``vhostsock`` command."""

import sys

from .cli import main

sys.exit(main())

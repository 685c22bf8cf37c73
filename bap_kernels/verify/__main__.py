"""``python -m bap_kernels.verify``: verifies the kernels of a GPU and prints a table.

Exit status: 0 where every family asked for is ok, 1 where one is not, 2 where nothing could be verified, 130 where it
was interrupted; what was found until then is kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from bap_kernels.verify import verify
from bap_kernels.verify.runner import TIMEOUT_S


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    description = "Finds out, in separate processes, which kernels run correctly on this GPU."
    parser = argparse.ArgumentParser(prog="python -m bap_kernels.verify", description=description)
    which = "a family, a pattern such as 'triton/*/bfloat16', or 'main': what inference in bfloat16 and TF32 needs"
    parser.add_argument("--family", action="append", metavar="F", help=f"{which}; repeatable")
    parser.add_argument("--device", type=int, metavar="N", help="number of the CUDA device, by default the current one")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, metavar="S", help="seconds that a call may take")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes side by side")
    parser.add_argument("--force", action="store_true", help="verify again families that have a verdict")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    options = parser.parse_args(arguments)
    try:
        report = verify(
            options.device, options.family, options.timeout, options.jobs, options.force, show=not options.quiet
        )
    except (RuntimeError, ValueError) as error:
        print(str(error).replace("verify():", "bap_kernels.verify:", 1), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bap_kernels.verify: interrupted; what was found is kept, and the next run goes on.", file=sys.stderr)
        return 130
    if options.json:
        print(json.dumps(report.as_dict(), indent=1))
    else:
        print(report)
        print(f"\nkept in {report.file or 'memory'}")
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())

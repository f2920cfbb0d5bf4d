"""The process that compares expressions: JSON lines in, JSON lines out. Run as a file, alone.

It may hang or grow on what it is given: whoever started it kills it then. Its own limits end it
where that one is gone.
"""

import json
import os
import resource
import sys

MEMORY = 2 << 30
CPU_SECONDS = 20


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # whatever a library prints is no reply
    for what, limit in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(what, (limit, limit))
    import logging

    logging.disable(logging.CRITICAL)  # math_verify warns of the timeouts that are not its own
    if hasattr(sys, "set_int_max_str_digits"):  # since Python 3.10.7
        sys.set_int_max_str_digits(4300)
    from math_verify import LatexExtractionConfig, parse, verify

    configuration = [LatexExtractionConfig()]

    def parsed(text: str):
        found = parse(f"${text}$", configuration, fallback_mode="no_fallback", parsing_timeout=None)
        return [one for one in found if not isinstance(one, str)]

    def compared(answer: str, truth: str) -> str:
        gold, given = parsed(truth), parsed(answer)
        if not gold or not given:
            return "unparsed"
        if verify(gold, given, timeout_seconds=None):
            return "equal"
        numbers = [
            getattr(one[0], "is_number", False) and one[0].is_finite for one in (gold, given)
        ]
        if all(numbers):
            a, t = (complex(one[0].evalf(20)) for one in (given, gold))
            return "different" if abs(a - t) > 0.05 * abs(t) + 1e-9 else "unsure"
        return "unsure"

    replies.write('"ready"\n')
    replies.flush()
    for line in sys.stdin.buffer:
        used = resource.getrusage(resource.RUSAGE_SELF)
        soon = int(used.ru_utime + used.ru_stime) + CPU_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (soon, resource.RLIM_INFINITY))
        try:
            number, answer, truth = json.loads(line)
            reply = [number, compared(answer, truth)]
        except Exception as error:
            reply = [number, f"error {type(error).__name__}"]
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()

"""What the service counts of itself, in the text format that Prometheus reads."""

import threading
from collections import Counter
from collections.abc import Iterable

_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds
_PREFIX = "e5v_search_"


class Metrics:
    """Safe in many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds: dict[str, list[float]] = {}  # route -> durations by bound, their sum, their number
        self._counts: Counter[str] = Counter()

    def request(self, route: str, status: int, seconds: float) -> None:
        with self._lock:
            self._requests[route, status] += 1
            found = self._seconds.setdefault(route, [0.0] * (len(_BOUNDS) + 2))
            for n, bound in enumerate(_BOUNDS):
                found[n] += seconds <= bound
            found[-2] += seconds
            found[-1] += 1

    def batch(self, questions: int) -> None:
        self.count("batches")
        self.count("batched_questions", questions)

    def count(self, name: str, by: int = 1) -> None:
        with self._lock:
            self._counts[name] += by

    def text(self, gauges: dict[str, float]) -> str:
        with self._lock:
            lines = [f"# TYPE {_PREFIX}requests_total counter"]
            for (route, status), n in sorted(self._requests.items()):
                lines.append(f'{_PREFIX}requests_total{{route="{route}",status="{status}"}} {n}')
            lines.append(f"# TYPE {_PREFIX}request_seconds histogram")
            for route, found in sorted(self._seconds.items()):
                lines += _histogram(route, found)
            for name, n in sorted(self._counts.items()):
                lines += [f"# TYPE {_PREFIX}{name}_total counter", f"{_PREFIX}{name}_total {n}"]
        for name, value in gauges.items():
            lines += [f"# TYPE {_PREFIX}{name} gauge", f"{_PREFIX}{name} {value:g}"]
        return "\n".join(lines) + "\n"


def _histogram(route: str, found: list[float]) -> Iterable[str]:
    name = f"{_PREFIX}request_seconds"
    for bound, n in zip((*_BOUNDS, "+Inf"), (*found[: len(_BOUNDS)], found[-1]), strict=True):
        yield f'{name}_bucket{{route="{route}",le="{bound}"}} {n:g}'
    yield f'{name}_sum{{route="{route}"}} {found[-2]:.6f}'
    yield f'{name}_count{{route="{route}"}} {found[-1]:g}'

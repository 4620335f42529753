"""Great circles on the sphere of the earth's mean radius."""

import math

RADIUS = 6_371_008.8  # metres
_MARGIN = 1e-7  # degrees, about a centimetre: a box must not lose a point to rounding


def distance(lat: float, lon: float, other_lat: float, other_lon: float) -> float:
    """Metres between two points given in degrees (haversine)."""
    a, b = math.radians(lat), math.radians(other_lat)
    h = math.sin((b - a) / 2) ** 2 + math.cos(a) * math.cos(b) * math.sin(math.radians(other_lon - lon) / 2) ** 2
    return 2 * RADIUS * math.asin(math.sqrt(min(h, 1.0)))


def box(lat: float, lon: float, metres: float) -> tuple[tuple[float, float], list[tuple[float, float]]]:
    """A range of latitudes and one or two ranges of longitudes (degrees) that hold every point within `metres`."""
    reach = math.degrees(metres / RADIUS) + _MARGIN
    south, north = lat - reach, lat + reach
    if south <= -90 or north >= 90:  # a pole lies inside, where all longitudes meet
        return (max(south, -90.0), min(north, 90.0)), [(-180.0, 180.0)]
    width = math.degrees(math.asin(min(math.sin(math.radians(reach)) / math.cos(math.radians(lat)), 1.0))) + _MARGIN
    west, east = lon - width, lon + width
    if west < -180:
        return (south, north), [(-180.0, east), (west + 360, 180.0)]
    if east > 180:
        return (south, north), [(west, 180.0), (-180.0, east - 360)]
    return (south, north), [(west, east)]

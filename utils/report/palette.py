"""The colour and the marker of each method: the same in every figure and on every page."""

import math
import zlib

# for a white and for a dark background
COLOURS = [
    ("#0072b2", "#56b4e9"), ("#c14d00", "#f0883e"), ("#007a5a", "#2fbf94"),
    ("#b3457f", "#e58fbd"), ("#9a7b00", "#e0c341"), ("#6a4fb0", "#b3a2e0"),
    ("#14919e", "#5fd3dc"), ("#7b4b2a", "#c99a6b"), ("#c41e3a", "#ff7b84"),
    ("#5f8a1f", "#a8d05a"),
]  # fmt: skip
# A place in these lists is a colour and a marker. A new method needs no entry: its name gives it a
# place that none of these has. An entry that moves would change figures that were made before.
DEFENSES = (
    "ft", "fmp", "awm", "fp", "nc", "anp", "abl", "nad", "i_bau", "ft_sam", "sau", "rnp", "clp",
    "trap_and_replace", "dbd", "ac", "spectral", "d_br", "d_st", "ep", "bnp", "nab", "npd", "mcr",
)  # fmt: skip
ATTACKS = (
    "badnet", "blended", "wanet", "inputaware", "sig", "lf", "ssba", "bpp", "refool", "lc",
    "trojannn", "adaptive_blend", "adaptive_patch", "ctrl", "ftrojan", "lira", "blind", "smooth",
    "trojan_sq", "trojan_wm", "l0_inv", "l2_inv", "clean",
)  # fmt: skip


def polygon(corners, turn=0.0, inner=None):
    """[(x, y)] on the unit circle, the first at the top; with `inner` those of a star."""
    count = corners if inner is None else 2 * corners
    points = []
    for place in range(count):
        radius = inner if inner is not None and place % 2 else 1
        angle = math.pi / 2 + turn + 2 * math.pi * place / count
        points.append((round(radius * math.cos(angle), 3), round(radius * math.sin(angle), 3)))
    return points


def plus(turn=0.0):
    """A thick plus sign."""
    arm = [(0.35, 1), (0.35, 0.35), (1, 0.35)]
    points = []
    for quarter in range(4):
        for x, y in arm:
            angle = turn - math.pi / 2 * quarter
            points.append(
                (
                    round(x * math.cos(angle) - y * math.sin(angle), 3),
                    round(x * math.sin(angle) + y * math.cos(angle), 3),
                )
            )
    return points


# circle, square, two triangles, diamond, plus, cross, pentagon, star: corners with y upwards
MARKERS = [
    polygon(28), polygon(4, math.pi / 4), polygon(3), polygon(4), polygon(3, math.pi), plus(),
    plus(math.pi / 4), polygon(5), polygon(5, inner=0.42),
]  # fmt: skip
PLACES = len(COLOURS) * len(MARKERS)  # as these share no factor, every place looks different


def look(name, known=DEFENSES):
    """(place in COLOURS, place in MARKERS) of a method, which `name` alone decides.

    A variant, fmp-random say, has the colour of its method and a marker of its own.
    """
    method, _, variant = name.partition("-")
    if method in known:
        place = known.index(method)
    else:
        place = len(known) + digest(method) % (PLACES - len(known))
    colour, marker = place % len(COLOURS), place % len(MARKERS)
    if variant:
        taken = {number % len(MARKERS) for number in range(colour, len(known), len(COLOURS))}
        free = [number for number in range(len(MARKERS)) if number not in {*taken, marker}]
        marker = free[digest(f"9 {variant}") % len(free)]  # where those of FMP differ
    return colour, marker


def digest(text):
    return zlib.crc32(text.encode("utf-8", "replace"))


def svg_path(marker, radius=5.5):
    """A marker as the path of an SVG file, in which y points down."""
    points = (f"{radius * x:.4g} {-radius * y:.4g}" for x, y in marker)
    return f"M{'L'.join(points)}Z"

"""How sure a share of right answers is: Wilson's score interval, which stays within 0 and 1 and works for few."""

Z95 = 1.959963984540054  # of the normal distribution, two-sided 95 %


def wilson(right: int, n: int, z: float = Z95) -> tuple[float, float]:
    """The interval of a share of `right` in `n` (E. B. Wilson, JASA 22, 1927). (0, 1) of none."""
    if n == 0:
        return 0.0, 1.0
    share, square = right / n, z * z
    middle = (share + square / (2 * n)) / (1 + square / n)
    half = z / (1 + square / n) * (share * (1 - share) / n + square / (4 * n * n)) ** 0.5
    return (0.0 if right == 0 else middle - half), (1.0 if right == n else middle + half)

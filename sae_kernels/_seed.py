"""Seeds out of seeds."""

_MASK32 = 0xFFFFFFFF


def mix_seed(seed: int, step: int) -> int:
    """One well-mixed 32-bit seed out of two numbers (splitmix64); torch's CPU generator reads 32 bits."""
    z = (seed * 0x9E3779B97F4A7C15 + (step + 1) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (z ^ (z >> 31)) & _MASK32

"""Independent seeds from a few whole numbers, such as (seed, block), as numpy's SeedSequence makes them.

The algorithm is O'Neill's seed_seq_fe with a pool of four words; numpy promises never to change it (NEP 19).
"""

from functools import cache

MASK = 0xFFFFFFFF  # all arithmetic is on 32 bits
LARGEST_SEED = 2**64 - 1


@cache
def mix(*numbers: int) -> int:
    """Return 32 well-mixed bits, numpy.random.SeedSequence(numbers).generate_state(1)[0].

    32 bits are all that torch's CPU generator uses of a seed. Each number is 0 or more; together they take at most
    four words of 32 bits.
    """
    words: list[int] = []
    for number in numbers:
        words.append(number & MASK)
        while number := number >> 32:
            words.append(number & MASK)
    if len(words) > 4:
        raise ValueError(f"the numbers {numbers} take more than 128 bits")
    factor = 0x43B0D7E5

    def hashed(word: int) -> int:
        nonlocal factor
        word ^= factor
        factor = factor * 0x931E8875 & MASK
        word = word * factor & MASK
        return word ^ word >> 16

    pool = [hashed(word) for word in (words + [0] * 4)[:4]]
    for source in range(4):
        for target in range(4):
            if source != target:
                mixed = (0xCA01F9DD * pool[target] - 0x4973F715 * hashed(pool[source])) & MASK
                pool[target] = mixed ^ mixed >> 16
    state = (pool[0] ^ 0x8B51F9DD) * (0x8B51F9DD * 0x58F38DED & MASK) & MASK
    return state ^ state >> 16

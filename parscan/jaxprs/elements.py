def components(closed, tangents, known, limit):
    return None


def pattern(closed, tangents, known, limit):
    return None

def check(rows, where):
    return None

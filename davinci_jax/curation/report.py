def write_report(config):
    return None

def main():
    raise SystemExit("rlhf: see --help")

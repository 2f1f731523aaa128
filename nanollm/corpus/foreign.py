def read_csv(stream, bad, delimiter=","): yield from ()
def read_warc(stream, bad): yield from ()

ADAPTERS = {}
def adapt(row, name="auto"):
    if not isinstance(row, dict): raise ValueError("not_an_object")
    t = row.get("text")
    if t is None: raise ValueError("missing_text")
    if not isinstance(t, str): raise ValueError("bad_type")
    return t, {}, None

"""What a stage of data preparation says about itself: lines for the screen, and a page with pictures."""
import html

TITLES = {"lengths": "Characters a document", "lang": "Languages", "sources": "Sources", "dropped": "Dropped, by reason",
          "quarantined": "Unreadable, by reason", "edited": "Edits, in documents changed",
          "cluster_sizes": "Size of the groups of duplicates", "quality": "Quality, in tenths"}
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;width:100%}td{padding:.1rem .5rem;vertical-align:top}td.n{text-align:right;white-space:nowrap;width:1%}
.bar{background:#4a7fb5;height:1em;min-width:1px}h1{font-size:1.4rem}h2{font-size:1.05rem;margin:1.6rem 0 .4rem}
.text{color:#555;overflow-wrap:anywhere}.big{font-size:1.1rem}"""


def shares(counts, total):
    """{"markup": 3} of 100 -> "markup 3 (3.00%)", the most frequent first."""
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return " | ".join(f"{name} {n:,} ({n / max(total, 1):.2%})" for name, n in ordered) or "none"


def head(text, n=60):
    return repr(" ".join(text[:n].split()) + ("…" if len(text) > n else ""))


def like(row):
    """What a dropped copy repeats, or nothing."""
    return f"repeats {row['dup_of']}" + (f", Jaccard {row['jaccard']:.3f}" if "jaccard" in row else "") + ": " if "dup_of" in row else ""


def summary(r):
    """in = kept + dropped + quarantined, in one line."""
    dropped, bad = sum(r["dropped"].values()), sum(r["quarantined"].values())
    return (f"in {r['in']:,} documents = kept {r['kept']:,} ({r['kept'] / max(r['in'], 1):.2%}), {r['chars']:,} characters "
            f"+ dropped {dropped:,} + quarantined {bad:,}")


def lines(name, r):
    """The report of a stage as lines of text."""
    out = [f"  {summary(r)}"]
    if r.get("changed"):
        out.append(f"  edited {r['changed']:,} of the kept: {shares(r.get('edited', {}), r['kept'])}")
    out.append(f"  dropped: {shares(r['dropped'], r['in'])}")
    if r.get("quality"):
        out.append(f"  quality of the kept, in tenths: {' | '.join(f'{t} {n:,}' for t, n in sorted(r['quality'].items(), key=lambda x: float(x[0])))}")
    for reason, rows in r["examples"].items():
        for row in rows:
            out.append(f"    {reason}: {row['id']} {like(row)}{head(row['text'])}")
    if r["quarantined"]:
        out.append(f"  quarantined: {shares(r['quarantined'], r['in'])}")
        out += [f"    {row['file']}:{row['line']}: {row['reason']} {row['error'] or head(row['head'])}" for row in r["first_bad"]]
    speed = f", {r['docs_per_second']:,} documents/s" if r["docs_per_second"] else ""
    out.append(f"  {r['seconds']:.1f} s{speed}, peak memory {r['peak_rss_mb']} MB a process")
    return out


def bars(counts):
    """A table of horizontal bars; numeric names in their order, others by size."""
    numeric = all(name.lstrip("-").replace(".", "", 1).isdigit() for name in counts)
    rows = sorted(counts.items(), key=lambda pair: float(pair[0]) if numeric else (-pair[1], pair[0]))
    most, total = max(counts.values()), sum(counts.values())
    return "<table>" + "".join(f'<tr><td class="n">{html.escape(name)}</td><td class="n">{n:,}</td><td class="n">{n / total:.1%}</td>'
                               f'<td><div class="bar" style="width:{100 * n / most:.1f}%"></div></td></tr>' for name, n in rows[:40]) + "</table>"


def render(name, r):
    """The page: counts, histograms, and examples of what went. Lengths are counted by powers of two: 512 means 512 to 1,023."""
    parts = [f"<h1>{html.escape(name)}</h1><p class='big'>{html.escape(summary(r))}</p>"]
    for key, title in TITLES.items():
        counts = {name: n for name, n in r.get(key, {}).items() if (key, name) != ("cluster_sizes", "1")}
        if counts:
            parts.append(f"<h2>{title}</h2>{bars(counts)}")
    if r.get("largest_clusters"):
        parts.append("<h2>Largest groups of duplicates</h2><table>")
        for group in r["largest_clusters"]:
            members = [(group["id"], f"stays for {group['size'] - 1:,}", group["text"]),
                       *((m["id"], m["kind"] + (f" {m['jaccard']:.2f}" if m["jaccard"] else ""), m["text"]) for m in group["members"])]
            parts += [f'<tr><td class="n">{html.escape(i)}</td><td class="n">{html.escape(why)}</td><td class="text">{html.escape(text[:100])}</td></tr>'
                      for i, why, text in members]
        parts.append("</table>")
    if r["examples"]:
        parts.append("<h2>Examples of what was dropped</h2><table>")
        parts += [f'<tr><td class="n">{html.escape(reason)}</td><td class="n">{html.escape(row["id"])}</td>'
                  f'<td class="text">{html.escape(like(row) + row["text"])}</td></tr>' for reason, rows in r["examples"].items() for row in rows]
        parts.append("</table>")
    if r["first_bad"]:
        parts.append("<h2>What could not be read</h2><table>")
        parts += [f'<tr><td class="n">{html.escape(row["file"])}:{row["line"]}</td><td>{html.escape(row["reason"])}</td>'
                  f'<td class="text">{html.escape(row["error"] or row["head"])}</td></tr>' for row in r["first_bad"]]
        parts.append("</table>")
    parts.append("<h2>Settings</h2><table>" + "".join(f'<tr><td class="n">{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>'
                                                      for k, v in r["settings"].items()) + "</table>")
    head = f"<meta charset='utf-8'><title>{html.escape(name)}</title><style>{STYLE}</style>"
    return f"<!doctype html><html><head>{head}</head><body>{''.join(parts)}</body></html>\n"

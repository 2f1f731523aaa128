"""The pages as a site, in English and Chinese: searchable, self-contained, mathematics drawn without a network.

    pip install -e ".[docs]"
    python -m learn.site                       builds out/site; open out/site/index.html through any web server
    python -m learn.site --serve true          builds it and serves it on http://localhost:8000

The pages are docs/ and the README as they stand; questions, errata and experiments are rendered from docs/questions, docs/errata
and learn/results. MkDocs Material builds each language; a link that leads nowhere is an error, inside a build and between the two.
"""
import ast
import html
import http.server
import json
import re
import shutil
import urllib.parse
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nanollm import ask
from nanollm.config import UserError, arg, run

ROOT = Path(__file__).resolve().parents[1]
WORDS = {"home": ("nanollm", "nanollm"), "course": ("Course", "课程"), "questions": ("Questions", "问题"), "errata": ("Errata of the notes", "笔记勘误"),
         "experiments": ("Experiments", "实验"), "stages": ("The stages", "各阶段"), "more": ("Reference", "参考"),
         "verdict": ("Verdict", "结论"), "place": ("notes", "笔记"), "code": ("code", "代码"), "shown": ("shown by", "演示"), "argument": ("nothing is run", "不运行"),
         "printed": ("What is printed", "笔记里写的"), "right": ("What is right", "正确的"), "see": ("How to see it", "怎样看到"),
         "figure": ("figure", "数值"), "stored": ("stored run", "存档的一次运行"), "within": ("another run lies within", "另一次运行应在其内"), "answers": ("answers", "回答"),
         "seconds": ("{:.0f} seconds on one core", "一个核上 {:.0f} 秒"),
         "asked": ("Each question of the notes in one place: the answer, the verdict on the notes' answer, and the command that shows it.",
                   "笔记里的每个问题：答案、对笔记答案的判断，以及演示它的命令。"),
         "wrongs": ("What the notes print, what is right, and how to see it. A star: a pipeline built from the notes would break silently.",
                    "笔记里写的、正确的，以及怎样看到。带星的：照笔记搭的流水线会悄悄出错。"),
         "tried": ("What happens if we do not? Each of these is one flat file, at most two minutes on a laptop, and prints what stands here.",
                   "不这样做会怎样？每个实验都是一个平铺的文件，笔记本电脑上最多两分钟，打印出的就是这里的数值。")}
STAGES = ("data cleaning deduplication decontamination tokenizer packing model pretrain sft preference_data reward_model dpo ppo distillation peft "
          "classify evaluation generation chat quantization export").split()


@dataclass
class Config:
    out: str = arg("out/site", "directory of the site")
    serve: bool = arg(False, "serve it on http://localhost:8000 afterwards")


def word(key, lang):
    return WORDS[key][lang == "zh"]


def plain(text):
    """Text of an entry as Markdown that shows it as it is: code in backticks stays code, everything else is escaped."""
    parts = re.split(r"(`[^`]+`)", text.strip())
    return "".join(p if p.startswith("`") else re.sub(r"([\\*_\[\]|#$])", r"\\\1", html.escape(p, quote=False)) for p in parts)


def question_pages(lang):
    """{path: Markdown}: a page a stage and an index."""
    pages, rows = {}, []
    for path in sorted(ask.QUESTIONS.glob("*.toml")):
        table, entries = ask.read(path)
        title = table.get(f"title_{lang}", path.stem)
        lines = [f"# {title}", ""]
        for e in entries:
            lines += [f"### {e['id']} {plain(e[lang])} {{#{e['id'].lower()}}}", "", plain(ask.filled(e[f"answer_{lang}"])), ""]
            facts = [f"**{word('verdict', lang)}**: {ask.VERDICTS[e['verdict']][lang == 'zh']}", f"{word('place', lang)} {', '.join(e['place'])}"]
            facts += [f"{word('code', lang)} " + ", ".join(f"`{name}`" for name in e["code"])] if e["code"] else []
            facts += [f"{word('shown', lang)} `{ask.spoken(command)}`" for command in ask.demonstrations(e)]
            facts += [f"{word('argument', lang)}: {plain(e[f'argument_{lang}'])}"] if f"argument_{lang}" in e else []
            lines += [f"- {fact}" for fact in facts] + [""]
            if e.get("experiment") and (ROOT / "learn" / "experiments" / f"{e['experiment']}.py").exists():
                lines += [f"- [{word('experiments', lang)}: {e['experiment']}](../experiments.md#{e['experiment']})", ""]
        pages[f"questions/{path.stem}.md"] = "\n".join(lines)
        rows.append(f"| [{title}]({path.stem}.md) | {entries[0]['id']} – {entries[-1]['id']} | {len(entries)} |")
    head = [f"# {word('questions', lang)}", "", word("asked", lang), "", "```bash", 'python -m nanollm.ask "为什么要 warmup"', "python -m nanollm.ask Q98", "```", "",
            "| | | |", "|---|---|---|", *rows]
    return {"questions/index.md": "\n".join(head)} | pages


def errata_page(lang):
    lines = [f"# {word('errata', lang)}", "", word("wrongs", lang), ""]
    stages = {e["id"]: e["stage"] for e in ask.entries()}
    linked = lambda see: f"[{see}](questions/{stages[see]}.md#{see.lower()})" if see in stages else f"`{see}`"
    for table, entries in sorted(map(ask.read, ask.ERRATA.glob("*.toml")), key=lambda found: int(found[1][0]["id"][1:])):
        lines += [f"## {table[f'title_{lang}']}", ""]
        for e in entries:
            lines += [f"### {'★ ' if e['star'] else ''}{e['id']} ({', '.join(e['place'])}) {{#{e['id'].lower()}}}", "",
                      f"**{word('printed', lang)}**: {plain(e[f'printed_{lang}'])}", "", f"**{word('right', lang)}**: {plain(e[f'right_{lang}'])}", "",
                      f"**{word('see', lang)}**: " + " · ".join(map(linked, e["see"])), ""]
    return {"errata.md": "\n".join(lines)}


def experiments_page(lang):
    """Each experiment: what it asks (its docstring; in Chinese, the questions that it answers), its picture, its stored figures."""
    lines = [f"# {word('experiments', lang)}", "", word("tried", lang), "", "```bash", "python -m learn.experiments all         # 全部" if lang == "zh" else
             "python -m learn.experiments all         # all of them", "python -m learn.experiments no_warmup", "```", ""]
    for path in sorted((ROOT / "learn" / "experiments").glob("[a-z]*.py")):
        name, doc = path.stem, ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        stored = ask.RESULTS / f"{name}.json"
        if not stored.exists():
            raise UserError(f"{name} has no stored result: python -m learn.experiments.{name} --record true makes it")
        record = json.loads(stored.read_text(encoding="utf-8"))
        mine = [e for e in ask.entries() if e.get("experiment") == name]
        title, _, text = doc.partition("\n")
        lines += [f"## {name} {{#{name}}}", ""]
        if lang == "zh":
            lines += [line for e in mine for line in (f"**{e['id']} {plain(e['zh'])}** {plain(ask.filled(e['answer_zh']))}", "")]
        else:
            lines += [plain(title), "", *(line if line.startswith("    ") else plain(line) for line in text.strip("\n").splitlines()), ""]
        if (ROOT / "docs" / "images" / "learn" / f"{name}.png").exists():
            lines += [f"![{name}](images/learn/{name}.png)", ""]
        lines += [f"| {word('figure', lang)} | {word('stored', lang)} | {word('within', lang)} |", "|---|---|---|"]
        lines += [f"| {plain(key)} | {f['mean']:.4g}{' ± ' + format(f['std'], '.2g') if len(f['runs']) > 1 else ''} | ± {f['within']:.2g} |" for key, f in record["figures"].items()]
        lines += ["", *(f"- {'✓' if holds else '✗'} {plain(claim)}" for claim, holds in record["claims"].items()), ""]
        lines += [f"{word('answers', lang)}: " + ", ".join(f"[{e['id']}](questions/{e['stage']}.md#{e['id'].lower()})" for e in mine) + " · " if mine else ""]
        lines[-1] += f"`python -m learn.experiments.{name}` · {word('seconds', lang).format(record['seconds'])} · {record['cpu']}, PyTorch {record['torch']} · {record['date']}"
        lines += [""]
    return {"experiments.md": "\n".join(lines)}


def sources(lang, to):
    """Everything of one language as Markdown under `to`, links as they must be there."""
    shutil.rmtree(to, ignore_errors=True)
    folder = ROOT / "docs" / ("zh" if lang == "zh" else "")
    pages = {p.relative_to(folder).as_posix(): p.read_text(encoding="utf-8") for p in sorted(folder.rglob("*.md")) if lang == "zh" or "zh" not in p.relative_to(folder).parts}
    if lang == "zh":                                          # the pictures are one folder further up there
        pages = {path: re.sub(r"\]\(((?:\.\./)+)images/", lambda m: f"]({m[1][3:]}images/", text) for path, text in pages.items()}
    readme = (ROOT / ("README_zh.md" if lang == "zh" else "README.md")).read_text(encoding="utf-8")
    readme = re.sub(r"\]\(docs/(?:zh/)?", "](", readme).replace("](README_zh.md)", "](zh/)").replace("](README.md)", "](../)")
    pages |= {"index.md": readme} | question_pages(lang) | errata_page(lang) | experiments_page(lang)
    for path, text in pages.items():
        (to / path).parent.mkdir(parents=True, exist_ok=True)
        (to / path).write_text(text, encoding="utf-8")
    shutil.copytree(ROOT / "docs" / "images", to / "images")
    names = {path.removesuffix(".md") for path in pages}
    course, questions = (sorted(f"{n}.md" for n in names if n.startswith(f"{part}/")) for part in ("course", "questions"))
    first = lambda found: sorted(found, key=lambda path: not path.endswith("index.md"))
    rest = sorted(n for n in names if "/" not in n and n not in (*STAGES, "index", "errata", "experiments"))
    return [{word("home", lang): "index.md"}, {word("course", lang): first(course)}, {word("questions", lang): first(questions)}, {word("errata", lang): "errata.md"},
            {word("experiments", lang): "experiments.md"}, {word("stages", lang): [f"{n}.md" for n in STAGES]}, {word("more", lang): [f"{n}.md" for n in rest]}]


def build(lang, docs_dir, site_dir, nav):
    """One language with MkDocs Material; nothing in it is fetched from elsewhere."""
    try:
        from mkdocs.commands.build import build as build_pages
        from mkdocs.config import load_config
    except ImportError:
        raise UserError('the site needs MkDocs Material: pip install -e ".[docs]"') from None
    switch = [{"name": "English", "link": "../" if lang == "zh" else "./", "lang": "en"}, {"name": "中文", "link": "./" if lang == "zh" else "zh/", "lang": "zh"}]
    settings = {
        "site_name": "nanollm", "docs_dir": str(docs_dir), "site_dir": str(site_dir), "nav": [part for part in nav if list(part.values())[0]],
        "strict": True, "use_directory_urls": False,
        "theme": {"name": "material", "language": lang, "font": False,
                  "palette": [{"scheme": "default", "primary": "indigo", "toggle": {"icon": "material/weather-night", "name": "dark"}},
                              {"scheme": "slate", "primary": "indigo", "toggle": {"icon": "material/weather-sunny", "name": "light"}}],
                  "features": ["navigation.indexes", "navigation.top", "navigation.footer", "search.highlight", "content.code.copy", "toc.follow"]},
        "plugins": [{"search": {"lang": ["en", "zh"] if lang == "zh" else ["en"], "separator": r"[\s\u200b\-，。；：、（）]+"}}],
        "markdown_extensions": ["tables", "attr_list", "md_in_html", "admonition", {"toc": {"permalink": True}}, "pymdownx.superfences", "pymdownx.highlight",
                                {"pymdownx.arithmatex": {"generic": True}}],
        "validation": {"links": {"anchors": "warn", "not_found": "warn", "unrecognized_links": "info"}, "nav": {"omitted_files": "warn"}},
        "extra": {"alternate": switch, "generator": False}}
    file = docs_dir.with_suffix(".yml")
    file.write_text(json.dumps(settings, indent=1), encoding="utf-8")               # JSON is YAML
    build_pages(load_config(str(file)))


def draw_mathematics(page):
    """LaTeX between $ signs as MathML, which browsers draw by themselves."""
    from latex2mathml.converter import convert
    text = page.read_text(encoding="utf-8")
    drawn = re.sub(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>',
                   lambda m: f'<div style="overflow-x: auto">{convert(html.unescape(m[3]), display="block")}</div>' if m[2] == "[" else
                   convert(html.unescape(m[3])), text, flags=re.S)             # a wide formula scrolls by itself on a narrow screen
    if drawn != text:
        page.write_text(drawn, encoding="utf-8")


def loose_ends(site):
    """Links and pictures that lead nowhere within the site, and anything that a page would fetch from elsewhere."""
    bad, anchors = [], {}
    pages = sorted(site.rglob("*.html"))
    for page in pages:
        anchors[page.resolve()] = set(re.findall(r'\bid="([^"]+)"', page.read_text(encoding="utf-8")))
    for page in pages:
        text = page.read_text(encoding="utf-8")
        bad += [f"{page.relative_to(site)} would fetch {url}" for url in re.findall(r'<(?:script|img|link)\b[^>]*\b(?:src|href)="(https?:[^"]+)"', text) if 'rel="canonical"' not in text]
        for target in set(re.findall(r'<(?:a|img)\b[^>]*?\b(?:href|src)="([^"]+)"', text)):
            path, _, anchor = urllib.parse.unquote(html.unescape(target)).partition("#")
            if re.match(r"[a-z]+:", target) or page.name == "404.html":
                continue
            file = (page.parent / path).resolve() if path else page.resolve()
            file = file / "index.html" if file.is_dir() else file
            if not file.exists():
                bad.append(f"{page.relative_to(site)}: {target} leads nowhere")
            elif anchor and file in anchors and anchor not in anchors[file] and anchor != "__search":
                bad.append(f"{page.relative_to(site)}: {target}: no such place on that page")
    return bad


def main(cfg):
    site, source = Path(cfg.out), Path(cfg.out).with_name(Path(cfg.out).name + "_source")
    for folder, mark in ((site, "search/search_index.json"), (source, "en.yml")):
        if folder.exists() and not (folder.is_dir() and ((folder / mark).exists() or not any(folder.iterdir()))):
            raise UserError(f"--out {cfg.out}: {folder} is there and holds something else than a site; name another directory")
    shutil.rmtree(site, ignore_errors=True)
    for lang in ("en", "zh"):
        build(lang, (source / lang).resolve(), (site / ("zh" if lang == "zh" else "")).resolve(), sources(lang, source / lang))
    for page in site.rglob("*.html"):
        draw_mathematics(page)
    bad = loose_ends(site)
    if bad:
        raise UserError(f"{len(bad)} loose ends: " + "; ".join(bad[:20]))
    print(f"{site}: {len(list(site.rglob('*.html')))} pages, {sum(f.stat().st_size for f in site.rglob('*') if f.is_file()) / 1e6:.1f} MB; every link leads somewhere")
    if cfg.serve:
        handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(site))
        print("http://localhost:8000 (Ctrl-C ends it)", flush=True)
        try:
            http.server.ThreadingHTTPServer(("127.0.0.1", 8000), handler).serve_forever()
        except OSError as e:
            raise UserError(f"--serve: port 8000 cannot be had ({e.strerror}); serve {site} with a web server of your own") from None


if __name__ == "__main__":
    run(main, Config, __doc__)

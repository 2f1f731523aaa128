"""One configuration rule for every script: dataclass defaults, then a TOML file, then --key value.

    @dataclass
    class Config:
        learning_rate: float = arg(3e-4, "peak learning rate", unit="per update")

    if __name__ == "__main__":
        run(main, Config, __doc__)

The dataclass at the top of a script is its reference run. An unknown key, in the TOML or on the command
line, is refused with the nearest valid one; nothing is ever silently ignored.
"""
import dataclasses
import difflib
import errno
import math
import os
import sys
import tomllib


class UserError(Exception):
    """A mistake the user can mend: one sentence that says what, where and what to do. Exit code 2."""


def arg(default, help, unit="", least=0):
    """A dataclass field that carries its own help text; a number below `least` is refused. Lists (for several paths) may
    be defaults too."""
    metadata = {"help": help, "unit": unit, "least": least}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


TRUE, FALSE = {"true", "1", "yes", "on"}, {"false", "0", "no", "off"}


def convert(key, value, default, where):
    """`value` (a string from the command line, or a TOML value) as the type of `default`."""
    kind = type(default)
    try:
        if kind is bool:
            word = str(value).lower()
            if word not in TRUE | FALSE:
                raise ValueError
            return word in TRUE
        if isinstance(value, bool):                      # bool is an int in Python: batch_size = true is a slip
            raise ValueError
        if kind is int:
            number = float(value)                        # 1e6 is a handy way to write a million steps
            if number != int(number):
                raise ValueError
            return int(value) if isinstance(value, int) or str(value).lstrip("+-").isdigit() else int(number)
        if kind is list:
            return [str(v) for v in (value if isinstance(value, list) else [value]) if v != ""]
        if kind is str and not isinstance(value, str):
            raise ValueError
        return kind(value)
    except (ValueError, TypeError, OverflowError):
        raise UserError(f"{where}: --{key} wants {kind.__name__}, got {value!r}") from None


def unknown(key, fields, where):
    near = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "see --help for the list"
    return UserError(f"{where}: unknown option {key!r}; {hint}")


def read_toml(path, fields, strict=True):
    """A flat TOML file as a dict; every key must be a field. strict=False leaves the other keys out and names them."""
    try:
        with open(path, "rb") as f:
            table = tomllib.load(f)
    except FileNotFoundError:
        raise UserError(f"--config: {path} does not exist; the presets are under configs/") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as e:
        raise UserError(f"--config: {path} is not a TOML file: {e}") from None
    others = [key for key in table if key not in fields]
    if others and strict:
        raise unknown(others[0], fields, path)
    if others:
        print(f"note: {path}: {', '.join(others)} play no part here", flush=True)
    return {key: value for key, value in table.items() if key in fields}


def parse(cls, argv):
    """Build `cls` from its defaults, the TOML named by --config, and `argv`, each overriding the one before.

    Accepts --key value, --key=value, several values for a list field, and --flag / --no_flag / --flag=false
    for booleans. Raises UserError for an unknown key, a missing or malformed value.

    cls.first names the option that words in front of all others belong to (`python -m nanollm.plot OUT OUT`);
    cls.any_preset = True reads another program's preset and takes from it what it knows.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    defaults = {name: getattr(cls(), name) for name in fields}
    given = {}                                           # key -> raw string(s) from the command line
    if argv and not argv[0].startswith("-") and hasattr(cls, "first"):
        argv = [f"--{cls.first}", *argv]
    i = 0
    while i < len(argv):
        word = argv[i]
        i += 1
        if not word.startswith("--"):
            raise UserError(f"command line: {word!r} belongs to no option; write --key value")
        key, equals, value = word[2:].partition("=")
        if key.startswith("no_") and key not in fields and isinstance(defaults.get(key[3:]), bool) and not equals:
            given[key[3:]] = "false"
            continue
        if key != "config" and key not in fields:
            raise unknown(key, list(fields) + ["config"], "command line")
        values = [value] if equals else []
        while not equals and i < len(argv) and not argv[i].startswith("--"):
            values.append(argv[i])
            i += 1
            if not isinstance(defaults.get(key), list):
                break
        if not values:
            if not isinstance(defaults.get(key), (bool, list)):
                raise UserError(f"command line: --{key} needs a value")
            values = [] if isinstance(defaults[key], list) else ["true"]
        given[key] = values if isinstance(defaults.get(key), list) else values[0]

    merged = dict(defaults)
    if "config" in given:
        path = given.pop("config")
        merged |= {k: convert(k, v, defaults[k], path) for k, v in read_toml(path, fields, not getattr(cls, "any_preset", False)).items()}
    merged |= {k: convert(k, v, defaults[k], "command line") for k, v in given.items()}
    for key, value in merged.items():
        least = fields[key].metadata.get("least", 0)
        if isinstance(value, (int, float)) and not least <= value < (2**63 if isinstance(value, int) else math.inf):
            raise UserError(f"--{key} {value}: wants a finite number of at least {least}" + " and less than 2^63" * (isinstance(value, int) and value > least))
    return cls(**merged)


def help_text(cls, doc):
    """What --help prints: the script's docstring, then each field with its default, unit and reason."""
    lines = [(doc or "").strip(), "", "options (defaults < --config FILE.toml < --key value):"]
    for f in dataclasses.fields(cls):
        default = getattr(cls(), f.name)
        unit = f" [{f.metadata['unit']}]" if f.metadata.get("unit") else ""
        lines.append(f"  --{f.name:<28} {f.metadata.get('help', '')}{unit} (default: {default!r})")
    return "\n".join(lines)


def unanswered(error):
    """One sentence for the RuntimeError of a collective (gloo, NCCL, the meeting at master_addr); None for any other."""
    text = str(error).partition("\n")[0]
    if not type(error).__name__.startswith("Dist") and not any(word in text for word in ("gloo", "Gloo", "NCCL", "ProcessGroup")):
        return None
    cause = ("it has ended; what it said stands above, and a process killed for memory says nothing" if "losed" in text or "reset" in text else
             "--master_addr and --master_port are wrong or behind a firewall, or not all launchers were started" if "connect" in text else
             "it hangs, has more work than this one (swap, a slow disk), or a firewall or the wrong network interface lies between "
             "(GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME); NANOLLM_TIMEOUT=SECONDS waits longer")
    return f"process {os.environ.get('RANK', 0)} got no answer from another one: {cause}. --resume auto goes on from the last checkpoint [{text[-100:]}]"


def run(main, cls, doc="", argv=None):
    """The last line of every script: parse, call main(cfg), and turn a UserError into one sentence and code 2."""
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):              # a Chinese sample must print under LC_ALL=C and on Windows
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    if "--help" in argv or "-h" in argv:
        print(help_text(cls, doc))
        return
    try:
        main(parse(cls, argv))
    except BrokenPipeError:                                  # `… | head` has read enough
        os._exit(0)
    except OSError as e:
        if e.errno != errno.ENOSPC:
            raise
        print(f"error: the disk is full ({e.filename or 'writing'}); free some space and run the same command again", file=sys.stderr, flush=True)
        sys.exit(2)
    except RuntimeError as e:
        if not (sentence := unanswered(e)):
            raise
        print(f"error: {sentence}", file=sys.stderr, flush=True)      # every process: the one that could speak for all may be the dead one
        os._exit(2)                                          # at once: leaving in good order would wait for the others again
    except UserError as e:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:    # once a machine
            print(f"error: {e}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr, flush=True)
        sys.exit(130)

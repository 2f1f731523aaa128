"""One step of a road: echo the command, skip it when its output is complete, run it, record time and memory.

    python -m nanollm.tools.step STAGE RUN_DIR COMMAND…          (runs/speedrun.sh is made of these)

A step is complete when RUN_DIR/steps/STAGE.json records the same command with the same --config file. It is written
only after the command has ended well, so an interrupted step runs again, and the training scripts then go on from
their newest checkpoint. Seconds and peak memory, of all tries that ended by
themselves or by Ctrl-C, go to RUN_DIR/stages.jsonl.
"""
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path


def peak_rss_mb():
    """Largest resident memory of the child that has just ended, in MB; None on systems that do not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024             # macOS counts bytes, Linux kilobytes
    return round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 2**20, 1)


def main(stage, run_dir, command):
    run_dir = Path(run_dir)
    done = run_dir / "steps" / f"{stage}.json"
    done.parent.mkdir(parents=True, exist_ok=True)
    shown = shlex.join(["python", *command])
    preset = Path(command[command.index("--config") + 1]).read_text(encoding="utf-8") if "--config" in command else ""
    if done.exists():
        before = json.loads(done.read_text(encoding="utf-8"))
        if (before["command"], before["preset"]) == (shown, preset):
            print(f"[{stage}] already complete, skipped ({shown})", flush=True)
            return 0
        when = done.stat().st_mtime_ns
        for record in [*done.parent.glob("*.json"), *done.parent.glob("*.begun")]:     # this step's and all made after it: stale now
            if record.stat().st_mtime_ns >= when:
                record.unlink()
                run = run_dir / record.stem
                if any(run.glob("step_*")):                    # a training run: set aside, or --resume auto would take it for done
                    shutil.rmtree(f"{run}.old", ignore_errors=True)
                    run.rename(f"{run}.old")
                    print(f"[{stage}] has changed: {run} is made again, the old one is {run}.old", flush=True)
    print(f"\n[{stage}] $ {shown}", flush=True)
    begun = done.with_suffix(".begun")                         # there from the first try to the end: what the tries have cost
    earlier = json.loads(begun.read_text(encoding="utf-8")) if begun.exists() else {"seconds": 0.0, "peak_rss_mb": 0.0}
    begun.write_text(json.dumps(earlier), encoding="utf-8")
    began = time.time()
    child = subprocess.Popen([sys.executable, *command])
    while True:
        try:
            code = child.wait()
            break
        except KeyboardInterrupt:                              # the child got the Ctrl-C too: let it save and end by itself
            continue
    cost = {"seconds": round(earlier["seconds"] + time.time() - began, 1), "peak_rss_mb": max(earlier["peak_rss_mb"], peak_rss_mb() or 0.0)}
    if code:
        begun.write_text(json.dumps(cost), encoding="utf-8")
        print(f"[{stage}] ended with code {code}; the same command goes on where it stopped (bash runs/speedrun.sh --force "
              f"starts over)", file=sys.stderr, flush=True)
        return code
    record = {"stage": stage, **cost, "command": shown}
    begun.unlink()
    done.write_text(json.dumps(record | {"preset": preset}), encoding="utf-8")
    with open(run_dir / "stages.jsonl", "a", encoding="utf-8") as f:
        f.write(json.dumps(record, ensure_ascii=False) + "\n")
    print(f"[{stage}] {record['seconds']} s, peak memory {record['peak_rss_mb']} MB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))

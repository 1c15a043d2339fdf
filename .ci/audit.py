"""Known weaknesses of what is installed, by pip-audit; where its service cannot be reached, a line that says so.

What has a version without the weakness fails, what has none is shown.
"""

import json
import subprocess
import sys


def main() -> None:
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--timeout", "15"]
    done = subprocess.run([*command, "--skip-editable"], capture_output=True, text=True)
    try:
        found = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        print(f"NOT AUDITED: {(done.stderr.strip().splitlines() or ['pip-audit says nothing'])[-1]}")
        return
    fixable = False
    for package in found:
        for weakness in package.get("vulns", ()):
            fixes = weakness["fix_versions"]
            fixable |= bool(fixes)
            print(
                f"{package['name']} {package['version']}: {weakness['id']}, "
                f"fixed in {', '.join(fixes) or 'no version yet'}"
            )
    skipped = [package["name"] for package in found if "skip_reason" in package]
    if len(skipped) == len(found):
        print(f"NOT AUDITED: the service that was reached knows none of the {len(found)} packages.")
    else:
        print(
            f"{len(found) - len(skipped)} packages audited; not known to the service: {', '.join(skipped) or 'none'}."
        )
    raise SystemExit(int(fixable))


if __name__ == "__main__":
    main()

"""Compiler launcher for nvcc: keeps what ptxas says about each kernel in `<object>.ptxas.log`, out of the build output.

Usage: ptxas_log.py nvcc ARGUMENTS...
"""

import subprocess
import sys
from pathlib import Path

command = sys.argv[1:]
result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
report = []
for line in result.stderr.splitlines(keepends=True):
    # The lines that follow "Function properties" are indented and come without the prefix.
    is_report = line.startswith("ptxas info") or (report and line.startswith("    ") and "bytes" in line)
    if is_report:
        report.append(line)
    else:
        sys.stderr.write(line)
if result.returncode == 0 and "-o" in command:
    Path(command[command.index("-o") + 1] + ".ptxas.log").write_text("".join(report), encoding="utf-8")
sys.exit(result.returncode)

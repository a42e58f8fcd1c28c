"""`iohangctl doctor` and `iohang-mount --check`: what would go wrong in an outage, said before there is one.

survey.py reads facts.py from the system; examination.py and of_source.py judge them, with what nfs.py and qemu.py know; findings.py
says what was found. The judges are pure, so that each finding is tested without the machine that has it.
"""

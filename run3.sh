cd /tmp/strangers/TIGON
head -45 utility.py | sed -n 22,45p

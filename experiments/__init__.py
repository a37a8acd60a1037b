"""What `launch.py --experiment=NAME` can run, one file each."""

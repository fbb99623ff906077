import os, platform, pwd, sys

with open("/proc/meminfo") as meminfo:
    memory = int(meminfo.readline().split()[1]) // 1024
disk = os.statvfs("/")

print("Hello from a microVM")
print(f"kernel   {platform.system()} {platform.release()}, up {open('/proc/uptime').read().split()[0]} s")
print(f"python   {platform.python_version()} on {platform.freedesktop_os_release()['PRETTY_NAME']}")
print(f"user     {pwd.getpwuid(os.getuid()).pw_name} in {os.getcwd()}")
print(f"machine  {os.cpu_count()} vCPU, {memory} MiB memory, {disk.f_frsize * disk.f_blocks / 2**30:.1f} GiB disk")
primes = [n for n in range(2, 2000) if all(n % d for d in range(2, int(n**0.5) + 1))]
print(f"work     {len(primes)} primes below 2000, the last is {primes[-1]}")
sys.exit(0)

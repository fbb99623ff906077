"""Tries to reach each place of a plan, over and over, and says which of them has ever answered.

A place is ["udp", ADDRESS, PORT], ["http", ADDRESS, PORT, HOST] or ["dns", ADDRESS, NAME]. It is tried without any
pause, unless it is one that is to be reached: those would use up the connections that a guest may have.
"""

import json, os, select, socket, struct, time

PLAN, STATE, PORT = "/tmp/plan.json", "/dev/shm/probe.json", 7007
PATIENCE, PAUSE, REPORT = 3.0, 0.1, 0.1
state = {"rounds": 0, "plan": 0, "answers": {}, "heard": 0, "own": 0}


def count(place):
    key = " ".join(map(str, place))
    state["answers"][key] = state["answers"].get(key, 0) + 1


class Request:
    """One HTTP request after the other."""

    def __init__(self, place, pause):
        self.place, self.pause, self.socket, self.begin = place, pause, None, 0.0

    def step(self, poll, now):
        if self.socket is None:
            if now - self.begin < self.pause:
                return
            self.begin, self.sent = now, False
            self.socket = socket.socket()
            self.socket.setblocking(False)
            self.socket.connect_ex((self.place[1], self.place[2]))
        events = [event for _, event in poll(self.socket)]
        try:
            if not self.sent and events and events[0] & select.POLLOUT:
                head = f"GET / HTTP/1.1\r\nHost: {self.place[3]}\r\nConnection: close\r\n\r\n"
                self.socket.send(head.encode())
                self.sent = True
            elif events and events[0] & select.POLLIN:
                if self.socket.recv(64):
                    count(self.place)
                self.end()
            elif events and events[0] & (select.POLLERR | select.POLLHUP):
                self.end()
        except OSError:
            self.end()
        if self.socket and now - self.begin > PATIENCE:
            self.end()

    def end(self):
        self.socket.close()
        self.socket = None


def look(one):
    """What can be done with a socket right now."""
    poller = select.poll()
    poller.register(one, select.POLLIN | select.POLLOUT)
    return poller.poll(0)


def datagram_socket(address):
    one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    one.bind((address, PORT if address else 0))
    one.setblocking(False)
    return one


def received(one):
    while True:
        try:
            yield one.recvfrom(4096)
        except OSError:
            return


def question(number, name):
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return struct.pack(">HHHHHH", number, 0x0100, 1, 0, 0, 0) + labels + b"\0\0\1\0\1"


def send(one, data, to):
    try:
        one.sendto(data, to)
    except OSError:
        pass


def new_plan(known):
    """The plan and when it was changed, if it is another one, and whole: it is being written meanwhile."""
    try:
        modified = os.stat(PLAN).st_mtime_ns
        with open(PLAN) as file:
            return (modified, json.load(file)) if modified != known else None
    except (FileNotFoundError, ValueError):
        return None


datagrams, questions, listening = datagram_socket(""), datagram_socket(""), datagram_socket("0.0.0.0")
accepting = socket.create_server(("0.0.0.0", PORT))
accepting.setblocking(False)
send(datagrams, b"?", ("127.0.0.1", PORT))
reached, forbidden, requests, modified, reported, asked = [], [], [], None, 0.0, 0.0

while True:
    now = time.monotonic()
    if now - reported > REPORT or now < reported:
        reported = now
        with open(STATE + ".new", "w") as file:
            json.dump(state, file)
        os.rename(STATE + ".new", STATE)
        plan = new_plan(modified)
        if plan:
            modified, plan = plan
            for request in requests:
                request.socket and request.end()
            state["plan"], reached, forbidden = plan["number"], plan["reached"], plan["forbidden"]
            requests = [Request(place, PAUSE) for place in reached if place[0] == "http"]
            requests += [Request(place, 0) for place in forbidden if place[0] == "http"]
            names = [place for place in reached + forbidden if place[0] == "dns"]
    state["rounds"] += 1
    for place in forbidden:
        if place[0] == "udp":
            send(datagrams, b"?", (place[1], place[2]))
    if now - asked > PAUSE or now < asked:
        asked = now
        for place in reached:
            if place[0] == "udp":
                send(datagrams, b"?", (place[1], place[2]))
        for number, place in enumerate(names if modified else []):
            send(questions, question(number, place[2]), (place[1], 53))
    for request in requests:
        request.step(look, now)
    for _, (address, port) in received(datagrams):
        count(["udp", address, port])
    for answer, _ in received(questions):
        number, _, _, records = struct.unpack(">HHHH", answer[:8])
        if records and number < len(names):
            count(names[number])
    for _, (address, _) in received(listening):
        state["own" if address == "127.0.0.1" else "heard"] += 1
    try:
        accepting.accept()[0].close()
        state["heard"] += 1
    except OSError:
        pass

package fair

import "time"

// A Meter measures the work of one reader and charges it to the reader's address. The zero value is ready for use and
// measures nothing before Begin. A Meter belongs to one goroutine at a time.
type Meter struct {
	load    *Load
	started time.Duration // since when the reader works, by Processors.Now; 0 while it waits
	owed    time.Duration // work that is not charged yet
}

// Begin starts the clock: the reader of the given load has something to do. It does nothing with a nil load, or while the
// processors are not shared. If the clock runs already, Begin starts it anew.
func (m *Meter) Begin(l *Load) {
	m.load = l
	if l != nil && l.all.Shared() {
		m.started = l.all.Now()
	}
}

// End stops the clock: the reader waits or pauses, or has nothing more to do. It does nothing if the clock does not run.
func (m *Meter) End() {
	if m.started != 0 {
		m.owed += m.load.all.Now() - m.started
		m.started = 0
	}
}

// Exclude takes a wait that has just ended out of the time since Begin.
func (m *Meter) Exclude(wait time.Duration) {
	if m.started != 0 {
		m.started += wait
	}
}

// Owe adds work that the address of the given load has caused before the reader began.
func (m *Meter) Owe(l *Load, work time.Duration) {
	m.load = l
	m.owed += work
}

// Delivered adds the work of a message that goes to the given number of clients (DeliveryWork).
func (m *Meter) Delivered(clients int) {
	if m.load != nil && m.load.all.Shared() {
		m.owed += time.Duration(clients) * DeliveryWork
	}
}

// Owed returns the work that is not charged yet.
func (m *Meter) Owed() time.Duration { return m.owed }

// Pay stops the clock and, from a WorkUnit on, charges the work to the address: the reader pauses if the address causes more
// work than its part (Load.Pay). If ended returns true, Pay forgets the work instead and does not wait.
func (m *Meter) Pay(ended func() bool) {
	m.End()
	if m.owed < WorkUnit {
		return
	}
	work := m.owed
	m.owed = 0
	if !ended() {
		m.load.Pay(work, ended)
	}
}

// Package fair divides what a process has between the addresses of its clients, so that an address that asks for a lot
// cannot take the part of the others. An address is a netip.Prefix: the caller decides how long it is (one IPv4 address,
// an IPv6 /64).
//
//   - A Queue drops values of the address that has the most.
//   - A Pool lends memory: an address may have at most as much as is left for the others.
//   - Processors make an address wait that keeps the processors busy for more than its part.
package fair
